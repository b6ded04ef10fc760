"""`unibiomed eval`: ask the records of a dataset, score the answers, and compare two runs."""
