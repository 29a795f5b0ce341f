"""Around a run: its description, plan and evaluation; exports and pictures of students."""
