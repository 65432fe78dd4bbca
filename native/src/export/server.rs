//! All clients of the NBD server.
//!
//! Invariant: `serve` returns once it is told to stop and every client's threads have ended. What all
//! clients have under way takes no more memory than `BUDGET`; a client that does not take its answers
//! is cut off after a while.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags};
use rustix::net::{self, RecvFlags, SendFlags, Shutdown};

use crate::error::{Error, Result};

use super::session::{self, Export, Terms};
use super::wire::{self, command, Request};

/// Bytes of answers that are under way, of all clients together.
const BUDGET: usize = 96 << 20;
/// And of one client; a single answer may be larger.
const OF_ONE: usize = 16 << 20;
/// Clients at a time; more are turned away.
const CLIENTS: usize = 64;
/// Threads that work for one client.
const WORKERS: usize = 2;
/// Time for a client to say what it wants, and to take an answer.
const PATIENCE: Duration = Duration::from_secs(120);
/// Blocks that are made ready before a client which reads in order asks for them.
const AHEAD: u64 = 4;

/// A connected socket. Writing to one whose other end is closed is an error, not a signal.
struct Socket(OwnedFd);

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(net::recv(&self.0, buffer, RecvFlags::empty())?.0)
    }
}

impl Write for &Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(net::send(&self.0, buffer, SendFlags::NOSIGNAL)?)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Socket {
    fn set_patience(&self, receiving: Option<Duration>) -> io::Result<()> {
        net::sockopt::set_socket_timeout(&self.0, net::sockopt::Timeout::Recv, receiving)?;
        net::sockopt::set_socket_timeout(&self.0, net::sockopt::Timeout::Send, Some(PATIENCE))?;
        Ok(())
    }

    fn hang_up(&self) {
        // One that has gone by itself needs no hanging up.
        let _ = net::shutdown(&self.0, Shutdown::Both);
    }
}

/// Memory that is lent to answers.
struct Budget {
    left: Mutex<(usize, usize)>,
    returned: Condvar,
    most: usize,
}

impl Budget {
    fn new(most: usize) -> Self {
        Self { left: Mutex::new((most, 0)), returned: Condvar::new(), most }
    }

    /// Wait until there is room. What is larger than all of it gets it alone.
    fn take(&self, bytes: usize) -> usize {
        let bytes = bytes.min(self.most);
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        while left.0 < bytes {
            left = self.returned.wait(left).unwrap_or_else(PoisonError::into_inner);
        }
        left.0 -= bytes;
        bytes
    }

    fn give_back(&self, bytes: usize) {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).0 += bytes;
        self.returned.notify_all();
    }
}

enum Work {
    Answer(Request, usize, usize),
    Prepare(u64),
}

/// Serve clients that come to a listening socket, until `stop` can be read from.
///
/// Raises `Error::Read` where the listening socket fails.
pub fn serve(exports: &[Export], listener: RawFd, stop: RawFd) -> Result<()> {
    // SAFETY: the caller keeps both open for the whole call.
    let (listener, stop) = unsafe { (BorrowedFd::borrow_raw(listener), BorrowedFd::borrow_raw(stop)) };
    let clients: Mutex<HashMap<RawFd, Arc<Socket>>> = Mutex::new(HashMap::new());
    let budget = Budget::new(BUDGET);
    let failed = |error: rustix::io::Errno| Error::Read { offset: 0, error: error.into() };
    thread::scope(|scope| {
        let outcome = loop {
            let mut waiting = [PollFd::new(&listener, PollFlags::IN), PollFd::new(&stop, PollFlags::IN)];
            match poll(&mut waiting, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => break Err(failed(error)),
            }
            if !waiting[1].revents().is_empty() {
                break Ok(());
            }
            let socket = match net::accept_with(listener, net::SocketFlags::CLOEXEC) {
                Ok(socket) => Arc::new(Socket(socket)),
                Err(rustix::io::Errno::BADF | rustix::io::Errno::INVAL | rustix::io::Errno::NOTSOCK) => {
                    break Err(failed(rustix::io::Errno::BADF))
                }
                // The client has gone again, or there are too many open files for now.
                Err(_) => {
                    thread::sleep(Duration::from_millis(20));
                    continue;
                }
            };
            let mut held = clients.lock().unwrap_or_else(PoisonError::into_inner);
            if held.len() >= CLIENTS {
                continue;
            }
            let number = socket.0.as_raw_fd();
            held.insert(number, socket.clone());
            drop(held);
            let (clients, budget) = (&clients, &budget);
            let run = move || {
                // An error here is a client that went or broke the protocol: it is cut off, no more.
                let _ = attend(&socket, exports, budget);
                socket.hang_up();
                clients.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
            };
            if thread::Builder::new().name("nbd client".into()).spawn_scoped(scope, run).is_err() {
                clients.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
            }
        };
        for socket in clients.lock().unwrap_or_else(PoisonError::into_inner).values() {
            socket.hang_up();
        }
        outcome
    })
}

/// One client, from its first byte to its last.
fn attend(socket: &Socket, exports: &[Export], budget: &Budget) -> io::Result<()> {
    socket.set_patience(Some(PATIENCE))?;
    // Small answers should not wait for more; a socket that is no TCP has no such setting.
    let _ = net::sockopt::set_tcp_nodelay(socket.0.as_fd(), true);
    let Some(terms) = session::handshake(&mut &*socket, exports)? else { return Ok(()) };
    socket.set_patience(None)?;
    let export = &exports[terms.export];
    let own = Budget::new(OF_ONE);
    let (sender, receiver) = mpsc::sync_channel(256);
    let receiver = Mutex::new(receiver);
    let writing = Mutex::new(());
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| work(socket, export, &terms, &receiver, &writing, budget, &own));
        }
        let outcome = listen(socket, export, &sender, budget, &own);
        drop(sender);
        outcome
    })
}

/// Take in a client's requests until it leaves.
fn listen(
    socket: &Socket, export: &Export, work: &mpsc::SyncSender<Work>, budget: &Budget, own: &Budget,
) -> io::Result<()> {
    let block = export.image.block_size as u64;
    let (mut expected, mut ready) = (u64::MAX, 0);
    let mut from = io::BufReader::with_capacity(4096, socket);
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    while let Some(request) = wire::read_request(&mut from)? {
        if request.command == command::DISC {
            return Ok(());
        }
        if request.command == command::WRITE {
            if request.length > wire::MAX_REQUEST {
                return Err(io::ErrorKind::InvalidData.into());
            }
            wire::skip(&mut from, u64::from(request.length))?;
        }
        let cost = session::cost(&request);
        let (mine, all) = (own.take(cost), budget.take(cost));
        work.send(Work::Answer(request, mine, all)).map_err(gone)?;
        if request.command == command::READ {
            let end = request.offset.saturating_add(u64::from(request.length));
            if request.offset == expected && request.length < 1 << 20 {
                let first = (end / block + 1).max(ready);
                ready = (end / block + 1 + AHEAD).min(export.size.div_ceil(block));
                for next in first..ready {
                    work.send(Work::Prepare(next * block)).map_err(gone)?;
                }
            } else {
                ready = 0;
            }
            expected = end;
        }
    }
    Ok(())
}

/// Answer requests until there are no more.
fn work(
    socket: &Socket, export: &Export, terms: &Terms, receiver: &Mutex<mpsc::Receiver<Work>>, writing: &Mutex<()>,
    budget: &Budget, own: &Budget,
) {
    loop {
        let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match next {
            Err(_) => return,
            Ok(Work::Prepare(offset)) => export.image.prepare(export.start + offset),
            Ok(Work::Answer(request, mine, all)) => {
                let answer = session::answer(export, terms, &request);
                let sent = {
                    let _one = writing.lock().unwrap_or_else(PoisonError::into_inner);
                    (&mut &*socket).write_all(&answer)
                };
                drop(answer);
                own.give_back(mine);
                budget.give_back(all);
                if sent.is_err() {
                    // Half an answer makes the rest senseless; the thread that listens then ends too.
                    socket.hang_up();
                }
            }
        }
    }
}
