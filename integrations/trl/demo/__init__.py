"""`rlloss demo`: a small model, trained plain and with remedies."""
