"""Files of strangers by the thousand: each is read, or named in one sentence; nothing hangs, runs or leads outside."""
