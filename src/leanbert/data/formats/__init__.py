"""Files as people have them: texts, records and labels."""
