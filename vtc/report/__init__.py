"""Reports of compressed calls: tokens kept, arithmetic saved, pictures."""
