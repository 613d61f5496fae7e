"""Pictures that a person understands: each function takes plain arrays and writes a PNG."""
