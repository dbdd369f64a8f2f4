//! Outrider itself as the system under test.
