"""For tests of backends, here and in other packages: a conformance suite and backends that fail on demand."""
