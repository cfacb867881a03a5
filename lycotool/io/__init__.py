"""Files: a lazy reader, a streaming atomic writer, metadata and hashes. No math, no key names."""
