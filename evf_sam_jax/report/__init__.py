"""What a run of the evaluation found, as one HTML file to look at, alone or beside another run."""
