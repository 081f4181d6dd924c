"""Other people's objects as judges: what restores by hand must restore through incckpt, to the last bit.

``make peers`` installs what this needs and runs it: ``python -m tests.peers``. It trains each object for some steps,
saves it, restores into a fresh one, trains on, and compares with an uninterrupted run: once by hand, with
``state_dict``, ``torch.save``, ``torch.load`` and ``load_state_dict``, and once through incckpt. It prints a row for
each object, and fails if incckpt does worse than the hand anywhere.

pytest does not collect it: it needs packages that the tests do without.
"""
