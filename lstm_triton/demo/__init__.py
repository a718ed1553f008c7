"""The demo: accuracy, a character language model trained for a minute, timing, and one report."""
