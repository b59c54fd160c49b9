"""Where decisions are made: no await, no clock, no chance, no network."""
