"""The course's machinery: lessons run, outputs kept clean, exercises checked."""
