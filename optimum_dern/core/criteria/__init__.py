"""Which experts stay: every selection criterion, and the limits under which it chooses."""
