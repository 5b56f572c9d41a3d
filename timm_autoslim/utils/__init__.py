"""What every package uses: tables, checks of arguments, whole files, tensors of nested values, meta copies."""
