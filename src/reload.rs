//! Values made from files, and made again when the files change.
//!
//! Who renews a certificate writes two files, one after the other, or moves a
//! directory's link. So files are looked at every few seconds, which also works where
//! no watch does (network and container file systems); a change counts when it has
//! stayed the same for one look. What cannot be made from the new files is reported,
//! and the old value stays.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// A value that may be replaced while it is in use.
#[derive(Debug)]
pub struct Current<T>(RwLock<Arc<T>>);

impl<T> Current<T> {
    /// The first one.
    pub fn new(value: Arc<T>) -> Arc<Self> {
        Arc::new(Self(RwLock::new(value)))
    }

    /// The newest one.
    pub fn get(&self) -> Arc<T> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, value: Arc<T>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = value;
    }
}

/// What tells one state of a file from another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    bytes: u64,
    modified: Option<SystemTime>,
}

fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(path).ok()?;
    Some(Stamp {
        inode: metadata.ino(),
        bytes: metadata.len(),
        modified: metadata.modified().ok(),
    })
}

fn stamps(files: &[PathBuf]) -> Vec<Option<Stamp>> {
    files.iter().map(|path| stamp(path)).collect()
}

/// Files, and the state in which they were last used.
#[derive(Debug, Clone)]
pub struct Watch {
    files: Vec<PathBuf>,
    used: Vec<Option<Stamp>>,
}

impl Watch {
    /// The state of the files now; to be taken before they are read.
    pub fn new(files: Vec<PathBuf>) -> Self {
        let used = stamps(&files);
        Self { files, used }
    }

    /// Whether the files are others than those that were last used; if so, these count as used.
    pub fn changed(&mut self) -> bool {
        let now = stamps(&self.files);
        let changed = now != self.used;
        self.used = now;
        changed
    }

    /// Makes the value again whenever the files change, until `stop` is cancelled.
    /// `told` hears how each attempt ended.
    pub async fn run<T, E>(
        mut self,
        current: Arc<Current<T>>,
        make: impl Fn() -> Result<Arc<T>, E>,
        told: impl Fn(Result<(), E>),
        stop: CancellationToken,
    ) {
        let mut seen = self.used.clone();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let now = stamps(&self.files);
            let settled = std::mem::replace(&mut seen, now.clone()) == now;
            if !settled || now == self.used {
                continue;
            }
            self.used = now;
            told(make().map(|value| current.set(value)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_read_and_a_bad_one_leaves_the_old_value() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("number");
        fs::write(&file, "1").unwrap();
        let current = Current::new(Arc::new(1));
        let watch = Watch::new(vec![file.clone()]);
        let (told, mut hears) = tokio::sync::mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let path = file.clone();
        let make = move || {
            let text = fs::read_to_string(&path).unwrap();
            text.parse::<u32>().map(Arc::new)
        };
        let told = move |result: Result<(), _>| told.send(result.is_ok()).unwrap();
        let task = tokio::spawn(watch.run(current.clone(), make, told, stop.clone()));
        fs::write(&file, "22").unwrap();
        assert_eq!(hears.recv().await, Some(true));
        assert_eq!(*current.get(), 22);
        fs::write(&file, "bad").unwrap();
        assert_eq!(hears.recv().await, Some(false));
        assert_eq!(*current.get(), 22);
        let other = folder.path().join("other");
        fs::write(&other, "3").unwrap();
        fs::rename(&other, &file).unwrap();
        assert_eq!(hears.recv().await, Some(true));
        assert_eq!(*current.get(), 3);
        stop.cancel();
        task.await.unwrap();
    }
}
