"""One module per dataset format: how its records look, and what conversation each holds."""
