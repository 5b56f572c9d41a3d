"""What is no test: models, folders and ways to run things that several tests share."""
