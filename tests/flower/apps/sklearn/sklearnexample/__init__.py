"""Logistic regression on digits, in the shape of Flower's quick-start for scikit-learn."""
