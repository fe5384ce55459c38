"""Starting ranks on hosts and keeping them started: the driver, worker slots, starters."""
