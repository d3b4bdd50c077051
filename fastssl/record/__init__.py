"""What a run says while it goes: metrics, the console, trackers, and a clock that survives restarts."""
