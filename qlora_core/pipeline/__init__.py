"""The stages as one job: keys, what is cached, what must run. Knows the stages' order, not their contents."""
