"""What looks at runs and at students: plans, evaluations, exports, pictures."""
