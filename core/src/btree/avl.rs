//! The AVL tree of a block's items (spec 02 section 7): links are in the items.
//!
//! The original's mkfs stores a wrong height in the root of its two items (spec 01
//! section 19); the first change of such a block puts it right, because the root
//! is then the first node above the change.

use super::layout::{NONE, compare, from_link, head, head_mut, item, item_mut, to_link};
use crate::format::Key;
use std::cmp::Ordering;

/// Where a search ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    /// The item with the key, or none.
    pub(super) node: usize,
    /// Without an equal item: the item that a new one becomes a child of.
    parent: usize,
    /// Without an equal item: how the key compares with `parent`'s.
    order: Ordering,
    /// The last item with a smaller key seen on the way.
    pub(super) smaller: usize,
    /// The last item with a greater key seen on the way.
    pub(super) greater: usize,
}

pub(super) fn root(b: &[u8]) -> usize {
    from_link(head(b).item_root.get())
}

pub(super) fn left(b: &[u8], off: usize) -> usize {
    from_link(item(b, off).node.left.get())
}

pub(super) fn right(b: &[u8], off: usize) -> usize {
    from_link(item(b, off).node.right.get())
}

fn parent(b: &[u8], off: usize) -> usize {
    from_link(item(b, off).node.parent.get())
}

fn set_left(b: &mut [u8], off: usize, to: usize) {
    item_mut(b, off).node.left = to_link(to).into();
}

fn set_right(b: &mut [u8], off: usize, to: usize) {
    item_mut(b, off).node.right = to_link(to).into();
}

fn set_parent(b: &mut [u8], off: usize, to: usize) {
    if off != NONE {
        item_mut(b, off).node.parent = to_link(to).into();
    }
}

/// Makes `to` the child of `above` (or the root) where `from` was.
fn replace_child(b: &mut [u8], above: usize, from: usize, to: usize) {
    if above == NONE {
        head_mut(b).item_root = to_link(to).into();
    } else if left(b, above) == from {
        set_left(b, above, to);
    } else {
        set_right(b, above, to);
    }
    set_parent(b, to, above);
}

fn height(b: &[u8], off: usize) -> u8 {
    if off == NONE {
        0
    } else {
        item(b, off).node.height
    }
}

fn balance(b: &[u8], off: usize) -> i16 {
    i16::from(height(b, right(b, off))) - i16::from(height(b, left(b, off)))
}

fn set_height(b: &mut [u8], off: usize) {
    let tallest = height(b, left(b, off)).max(height(b, right(b, off)));
    item_mut(b, off).node.height = tallest + 1;
}

/// Looks for `key` from the root.
pub(super) fn search(b: &[u8], key: &Key) -> Found {
    let mut found = Found {
        node: NONE,
        parent: NONE,
        order: Ordering::Equal,
        smaller: NONE,
        greater: NONE,
    };
    let mut off = root(b);
    while off != NONE {
        let it = item(b, off);
        let order = compare(key, &it.key);
        match order {
            Ordering::Equal => {
                found.node = off;
                return found;
            }
            Ordering::Less => found.greater = off,
            Ordering::Greater => found.smaller = off,
        }
        (found.parent, found.order) = (off, order);
        off = from_link(match order {
            Ordering::Less => it.node.left.get(),
            _ => it.node.right.get(),
        });
    }
    found
}

/// The first item with a key at or after `key`.
pub(super) fn at_or_after(b: &[u8], key: &Key) -> usize {
    let found = search(b, key);
    if found.node == NONE {
        found.greater
    } else {
        found.node
    }
}

/// The last item with a key at or before `key`.
pub(super) fn at_or_before(b: &[u8], key: &Key) -> usize {
    let found = search(b, key);
    if found.node == NONE {
        found.smaller
    } else {
        found.node
    }
}

fn leftmost(b: &[u8], mut off: usize) -> usize {
    while off != NONE && left(b, off) != NONE {
        off = left(b, off);
    }
    off
}

fn rightmost(b: &[u8], mut off: usize) -> usize {
    while off != NONE && right(b, off) != NONE {
        off = right(b, off);
    }
    off
}

/// The item with the least key.
pub(super) fn first(b: &[u8]) -> usize {
    leftmost(b, root(b))
}

/// The item with the greatest key.
pub(super) fn last(b: &[u8]) -> usize {
    rightmost(b, root(b))
}

/// The item after `off` in key order.
pub(super) fn next(b: &[u8], mut off: usize) -> usize {
    if right(b, off) != NONE {
        return leftmost(b, right(b, off));
    }
    loop {
        let above = parent(b, off);
        if above == NONE || left(b, above) == off {
            return above;
        }
        off = above;
    }
}

/// The item before `off` in key order.
pub(super) fn prev(b: &[u8], mut off: usize) -> usize {
    if left(b, off) != NONE {
        return rightmost(b, left(b, off));
    }
    loop {
        let above = parent(b, off);
        if above == NONE || right(b, above) == off {
            return above;
        }
        off = above;
    }
}

/// Turns `off` down to the left; its right child takes its place.
fn rotate_left(b: &mut [u8], off: usize) -> usize {
    let (above, up) = (parent(b, off), right(b, off));
    let middle = left(b, up);
    set_right(b, off, middle);
    set_parent(b, middle, off);
    replace_child(b, above, off, up);
    set_left(b, up, off);
    set_parent(b, off, up);
    set_height(b, off);
    set_height(b, up);
    up
}

/// Turns `off` down to the right; its left child takes its place.
fn rotate_right(b: &mut [u8], off: usize) -> usize {
    let (above, up) = (parent(b, off), left(b, off));
    let middle = right(b, up);
    set_left(b, off, middle);
    set_parent(b, middle, off);
    replace_child(b, above, off, up);
    set_right(b, up, off);
    set_parent(b, off, up);
    set_height(b, off);
    set_height(b, up);
    up
}

/// Recomputes heights and balances from `off` up to where nothing changes.
fn rebalance(b: &mut [u8], mut off: usize) {
    while off != NONE {
        let before = height(b, off);
        set_height(b, off);
        match balance(b, off) {
            2.. => {
                let tall = right(b, off);
                if balance(b, tall) < 0 {
                    rotate_right(b, tall);
                }
                off = rotate_left(b, off);
            }
            ..=-2 => {
                let tall = left(b, off);
                if balance(b, tall) > 0 {
                    rotate_left(b, tall);
                }
                off = rotate_right(b, off);
            }
            _ if height(b, off) == before => return,
            _ => {}
        }
        off = parent(b, off);
    }
}

/// Links the item at `off` where the search for its key ended.
pub(super) fn insert(b: &mut [u8], off: usize, at: &Found) {
    let above = at.parent;
    if above == NONE {
        head_mut(b).item_root = to_link(off).into();
    } else if at.order == Ordering::Less {
        set_left(b, above, off);
    } else {
        set_right(b, above, off);
    }
    let node = &mut item_mut(b, off).node;
    *node = Default::default();
    node.parent = to_link(above).into();
    node.height = 1;
    rebalance(b, above);
}

/// Unlinks the item at `off`.
pub(super) fn remove(b: &mut [u8], off: usize) {
    if left(b, off) != NONE && right(b, off) != NONE {
        let successor = leftmost(b, right(b, off));
        swap_places(b, off, successor);
    }
    let child = match left(b, off) {
        NONE => right(b, off),
        child => child,
    };
    let above = parent(b, off);
    replace_child(b, above, off, child);
    rebalance(b, above);
}

/// Exchanges the places of an item and its in-order successor below it.
fn swap_places(b: &mut [u8], upper: usize, lower: usize) {
    let (above, lower_above) = (parent(b, upper), parent(b, lower));
    let (upper_node, lower_node) = (item(b, upper).node, item(b, lower).node);
    // The successor has no left child, so `upper` takes over its right one only.
    item_mut(b, upper).node = lower_node;
    item_mut(b, lower).node = upper_node;
    replace_child(b, above, upper, lower);
    let left_child = from_link(upper_node.left.get());
    set_parent(b, left_child, lower);
    if lower_above == upper {
        set_right(b, lower, upper);
        set_parent(b, upper, lower);
    } else {
        set_parent(b, from_link(upper_node.right.get()), lower);
        set_left(b, lower_above, upper);
    }
    set_parent(b, from_link(lower_node.right.get()), upper);
}

/// Fixes the links to an item whose bytes were copied from slot `from` to `to`.
pub(super) fn relocate(b: &mut [u8], from: usize, to: usize) {
    let above = parent(b, to);
    replace_child(b, above, from, to);
    let (l, r) = (left(b, to), right(b, to));
    set_parent(b, l, to);
    set_parent(b, r, to);
}
