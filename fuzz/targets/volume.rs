//! Small volumes with a few bytes changed: checked, printed, mounted, used, left.
#![no_main]
use outrider_core::hurt::{Source, volume::Subject};
thread_local! {
    static MADE: [Subject; 2] = Subject::made();
    static CRASHED: Subject = Subject::golden("c1");
}
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut source = Source::new(bytes);
    let which = source.u8();
    let mut run = |subject: &Subject| drop(subject.exercise(&subject.parse(&mut source)));
    match which % 16 {
        0 => CRASHED.with(run),
        n => MADE.with(|made| run(&made[usize::from(n % 2)])),
    }
});
