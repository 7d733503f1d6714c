"""The parts of a row: what is said, which images it has, what is wrong with it; rows of users become records."""
