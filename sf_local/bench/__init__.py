"""What `sf-local bench` measures, beside what the machine can do at most."""
