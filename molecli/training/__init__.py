"""What trains: the loop, gates, searched weights, adapters, and the data that they learn from."""
