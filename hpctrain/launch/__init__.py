"""Start ranks on hosts and keep them started: the driver, worker slots, starters."""
