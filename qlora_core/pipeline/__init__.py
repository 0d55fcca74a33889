"""The stages as one job: keys, what is cached, what must run. Knows the order of the stages and nothing of their contents."""
