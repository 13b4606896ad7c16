"""Energy by the counters that machines have: gross, and less what the machine takes when it does nothing."""
