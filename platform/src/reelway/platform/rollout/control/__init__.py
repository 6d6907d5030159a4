"""The controller as a process: its loop, its memory, and the doors that alerts and commands come through."""
