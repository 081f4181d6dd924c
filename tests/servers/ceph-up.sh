#!/usr/bin/env bash
# Starts a Ceph RADOS gateway on one machine, on loopback, for `make test-ceph`:
#
#     tests/servers/ceph-up.sh FOLDER PORT [bluestore|memstore]
#     tests/servers/ceph-up.sh FOLDER stop
#
# Needs the Debian packages radosgw ceph-mon ceph-osd ceph-common. The keys are test and testtest. Everything is kept
# below FOLDER, whose old content is removed.
set -euo pipefail

folder=$(realpath -m "$1")
port=$2
store=${3:-bluestore}

stop() {
    for file in "$folder"/run/*.pid; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || true
        while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
        rm -f "$file"
    done
}

stop
[ "$port" = stop ] && exit 0

rm -rf "$folder"
mkdir -p "$folder"/{mon,osd,run,log}
configuration=$folder/ceph.conf
keyring=$folder/keyring
fsid=$(cat /proc/sys/kernel/random/uuid)
osd=$(cat /proc/sys/kernel/random/uuid)
monitor_port=$((port + 1))

# One daemon of each kind and one copy of everything: a test of the protocol, not of a cluster.
cat >"$configuration" <<END
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$monitor_port]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = $keyring
run dir = $folder/run
admin socket = $folder/run/\$cluster-\$name.asok
pid file = $folder/run/\$name.pid
log file = $folder/log/\$name.log
crash dir = $folder/log
mon data = $folder/mon
osd data = $folder/osd
osd objectstore = $store
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 4000
mon data avail warn = 1
mon data avail crit = 1
osd class load list = *
osd class default list = *
bluestore block size = 10737418240
bluestore cache autotune = false
bluestore cache size = 134217728
memstore device bytes = 4294967296
[client.admin]
rgw frontends = beast endpoint=127.0.0.1:$port tcp_nodelay=1
END

ceph-authtool --create-keyring "$keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool "$keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
monmaptool --create --clobber --fsid "$fsid" --addv a "[v2:127.0.0.1:$monitor_port]" "$folder/monmap" >/dev/null
ceph-mon -c "$configuration" --mkfs -i a --monmap "$folder/monmap" --keyring "$keyring"
ceph-mon -c "$configuration" -i a
ceph -c "$configuration" osd new "$osd" >/dev/null
ceph -c "$configuration" auth get-or-create osd.0 mon 'allow profile osd' osd 'allow *' mgr 'allow profile osd' >>"$keyring"
ceph-osd -c "$configuration" -i 0 --mkfs --osd-uuid "$osd" >/dev/null 2>&1
ceph-osd -c "$configuration" -i 0 >/dev/null 2>&1
radosgw -c "$configuration" -n client.admin
radosgw-admin -c "$configuration" user create --uid=test --display-name=test --access-key=test --secret=testtest >/dev/null 2>&1

for _ in $(seq 600); do
    if curl --silent --output /dev/null --max-time 1 "http://127.0.0.1:$port/"; then
        echo "a Ceph gateway listens on http://127.0.0.1:$port"
        exit 0
    fi
    sleep 0.1
done
echo "the gateway did not come up; see $folder/log" >&2
exit 1
