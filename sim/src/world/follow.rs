//! The steps of followers (`oracle::walk`): archive agents that ask what has changed,
//! in the middle of everything.

use super::workload::{Desk, Scene};
use crate::model::{Model, S_IFMT, S_IFREG};
use crate::oracle::walk::{FOLLOWERS, Step, place};
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Archive, IndexEntry, Posix};

/// Entries asked for at a time at the end.
const MANY: usize = 1000;

impl Desk {
    /// The entries that a step brings, at most `max`.
    async fn walk<P: Archive>(
        &self,
        fs: &P,
        step: &Step,
        max: usize,
    ) -> Result<Vec<IndexEntry>, Errno> {
        let (ticket, from) = (self.ticket(), place(&step.from));
        let args = [ticket, step.from.major, step.from.ino, max as u64];
        self.tell("walk", &args, || {
            format!(
                "?{ticket} Walk {{ index: {:?}, from: {from}, max: {max} }}",
                step.index
            )
        });
        let asked = async || -> Result<_, Errno> {
            let seq = fs.committed_seq().await?;
            self.followers().committed(step, seq);
            let walk = fs.walk_inodes(step.index, step.from, IndexEntry::LAST, max);
            Ok((seq, walk.await?))
        };
        let answer = asked().await;
        let args = match &answer {
            Ok((seq, shown)) => [ticket, *seq, shown.len() as u64],
            Err(errno) => [ticket, u64::MAX, errno.0 as u64],
        };
        self.tell("answer", &args, || match &answer {
            Ok((seq, shown)) => {
                let shown: Vec<String> = shown.iter().map(place).collect();
                format!("!{ticket} [{}], committed to {seq}", shown.join(" "))
            }
            Err(errno) => format!("!{ticket} {errno}"),
        });
        let (seq, shown): (u64, Vec<IndexEntry>) = answer?;
        self.followers().walked(step, seq, max, &shown);
        Ok(shown)
    }
}

impl<P: Posix + Archive> Scene<P> {
    /// A follower takes a step, unless it is at one.
    pub async fn walk(&self, follower: u8, max: usize) {
        let step = self.desk.followers().begin(follower);
        let Some(step) = step else { return };
        self.desk.count();
        // What fails leaves it where it was.
        let _ = self.desk.walk(&**self.kernel.fs(), &step, max).await;
    }

    /// When everything is well, and nobody changes anything: all followers go on until
    /// nothing is left. Then they must have been shown everything in `state`.
    ///
    /// # Errors
    /// A sentence about what failed.
    pub async fn follow_to_the_end(&self, state: &Model) -> Result<(), String> {
        let fs = self.kernel.fs();
        let failed = |errno: Errno| format!("a walk failed: {errno}");
        let seq = fs.committed_seq().await.map_err(failed)?;
        for follower in 0..FOLLOWERS {
            loop {
                let step = self.desk.followers().begin(follower);
                let Some(step) = step else { break };
                let shown = self.desk.walk(&**fs, &step, MANY).await.map_err(failed)?;
                if shown.is_empty() {
                    break;
                }
            }
        }
        for ino in state.reachable() {
            let stat = fs.stat_more(ino).await.map_err(failed)?;
            let is_file = state
                .get(ino)
                .is_some_and(|inode| inode.mode & S_IFMT == S_IFREG);
            self.desk.followers().last(seq, ino, is_file, &stat);
        }
        Ok(())
    }
}
