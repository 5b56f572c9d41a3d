"""What every wing uses: checks of arguments, files written whole, copies without data, the stack of running modules."""
