"""What a run will need and take, read from the program that the compiler makes for its devices."""
