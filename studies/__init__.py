"""Studies: arms × data sizes × seeds of one comparison, run, resumed and reported from one YAML file."""
