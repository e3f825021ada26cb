"""What both gpu_etl and model need, and neither owns. Imports nothing of the project."""
