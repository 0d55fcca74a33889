"""How much memory a trial takes, part by part, before anything is loaded; and how to run it so that it fits."""
