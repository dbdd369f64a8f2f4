//! x
/// Runs `f` on a thread of its own, as the executor demands.
///
/// # Errors
/// The message of its panic.
#[allow(clippy::disallowed_methods)] // one fresh thread per world: thread-local state differs otherwise
pub fn on_fresh_thread<T: Send + 'static>(
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    std::thread::Builder::new()
        .name("world".to_owned())
        .spawn(f)
        .expect("a thread for the world")
        .join()
        .map_err(|panic| {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            text.or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "a panic without a message".to_owned())
        })
}
