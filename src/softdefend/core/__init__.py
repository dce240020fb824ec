"""What everything else stands on: errors, the threat model, random streams, atomic files, weights on disk."""
