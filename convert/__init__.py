"""The conversion tool as it is called in a checkout; `unibiomed convert` is the same."""
