"""The speculator: it guesses token trees; slow, wrong or dead it costs speed, never output."""
