"""Learning that the machine or the job is about to be stopped: signals, and the notices that clouds publish."""
