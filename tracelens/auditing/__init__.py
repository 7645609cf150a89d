"""What an audit is put together from: which models run, what is measured of each, and what may be said about it."""
