"""Local steps, rounds, and the evaluator that trains schedules."""
