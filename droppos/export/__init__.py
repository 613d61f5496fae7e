"""The way out: trained weights in the formats that people load."""
