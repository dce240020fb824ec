"""Models that others can use: published on the hub, exported, and listed with an audit."""
