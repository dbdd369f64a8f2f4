//! Called by `mount(8)` and `umount(8)` through links named
//! `/sbin/mount.fuse.outrider` and `/sbin/umount.fuse.outrider`: their command lines
//! in terms of ours.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// The command line to parse: the given one, or ours for a helper's.
pub fn rewrite(args: Vec<OsString>) -> Vec<OsString> {
    let name = args
        .first()
        .map(Path::new)
        .and_then(Path::file_name)
        .and_then(OsStr::to_str);
    match name {
        Some(name) if name.starts_with("mount.") => mount(&args),
        Some(name) if name.starts_with("umount.") => umount(&args),
        _ => args,
    }
}

/// `mount.TYPE SOURCE DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`
fn mount(args: &[OsString]) -> Vec<OsString> {
    let mut out: Vec<OsString> = vec![args[0].clone(), "mount".into()];
    let mut rest = args[1..].iter();
    let mut paths = Vec::new();
    while let Some(arg) = rest.next() {
        match arg.to_str() {
            Some("-o") => {
                out.push(arg.clone());
                out.extend(rest.next().cloned());
            }
            Some("-t" | "-N") => {
                rest.next();
            }
            Some(flag) if flag.starts_with('-') && flag.len() > 1 => {}
            _ => paths.push(arg.clone()),
        }
    }
    out.push("--".into());
    out.extend(paths);
    out
}

/// `umount.TYPE DIR [-fln...] [-t TYPE]`
fn umount(args: &[OsString]) -> Vec<OsString> {
    let mut out: Vec<OsString> = vec![args[0].clone(), "umount".into()];
    let mut rest = args[1..].iter();
    let mut paths = Vec::new();
    while let Some(arg) = rest.next() {
        match arg.to_str() {
            Some("-t" | "-N") => {
                rest.next();
            }
            Some(flag) if flag.starts_with('-') && flag.len() > 1 => {
                for letter in ['f', 'l'] {
                    if flag.contains(letter) {
                        out.push(format!("-{letter}").into());
                    }
                }
            }
            _ => paths.push(arg.clone()),
        }
    }
    out.push("--".into());
    out.extend(paths);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(line: &str) -> String {
        let args = line.split(' ').map(OsString::from).collect();
        let out: Vec<String> = rewrite(args)
            .iter()
            .map(|arg| arg.to_string_lossy().into_owned())
            .collect();
        out.join(" ")
    }

    #[test]
    fn helper_lines_become_ours() {
        assert_eq!(
            rewritten("/sbin/mount.fuse.outrider /dev/b /mnt -n -o metadev_path=/dev/a -t x"),
            "/sbin/mount.fuse.outrider mount -o metadev_path=/dev/a -- /dev/b /mnt"
        );
        assert_eq!(
            rewritten("umount.fuse.outrider /mnt -f -t fuse.outrider"),
            "umount.fuse.outrider umount -f -- /mnt"
        );
        assert_eq!(rewritten("outrider mkfs a b"), "outrider mkfs a b");
    }
}
