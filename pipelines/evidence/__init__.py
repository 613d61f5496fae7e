"""Evidence: does the method learn what the paper says, on pictures that can be had here?"""
