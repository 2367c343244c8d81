#!/usr/bin/perl
# A stand-in for a vLLM that spans hosts, for tests of what moves with what: it joins at --master-port as vLLM does, and
# its head answers HTTP once all nodes are connected. It computes nothing. With a file /etc/no-context-of-512 it fails
# to start with that context, after so many seconds as the file says.
use strict;
use warnings;
use IO::Socket::INET;

my %flag;
for my $i (0 .. $#ARGV - 1) { $flag{$ARGV[$i]} = $ARGV[$i + 1] if $ARGV[$i] =~ /^--/ }
if (open my $fails, '<', "/etc/no-context-of-$flag{'--max-model-len'}") {
    sleep(<$fails> // 0);
    exit 1;
}
my @master = (PeerAddr => $flag{'--master-addr'}, PeerPort => $flag{'--master-port'});

if ($flag{'--node-rank'}) {
    my $head;
    sleep 1 until $head = IO::Socket::INET->new(@master);
    <$head> // exit 1;    # the head left before all were there
    sleep 1 while 1;    # as vLLM's worker: it does not see that its head has left
}

# Its own connection is to another address, for sandbox hosts share this machine's table of sockets: a worker would take
# it for its own, and not see that its head has left.
my $join = IO::Socket::INET->new(LocalPort => $flag{'--master-port'}, Listen => 9, ReuseAddr => 1) or die "$!";
my $own = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $flag{'--master-port'}) or die "$!";
my @ranks;
push @ranks, scalar $join->accept while @ranks < $flag{'--nnodes'};
print $_ "all are there\n" for @ranks;
$_->flush for @ranks;

my $api = IO::Socket::INET->new(
    LocalAddr => $flag{'--host'}, LocalPort => $flag{'--port'}, Listen => 9, ReuseAddr => 1) or die "$!";
while (my $client = $api->accept) {
    my ($path) = (<$client> // '') =~ m{^\w+ (\S+)};
    while (my $line = <$client>) { last if $line =~ /^\s*$/ }
    my $body = $path && $path eq '/v1/models'
        ? qq({"data": [{"id": "tiny", "max_model_len": $flag{'--max-model-len'}}]})
        : '{"choices": [{"text": "x"}]}';
    print $client "HTTP/1.1 200 OK\r\nContent-Length: ", length $body, "\r\nConnection: close\r\n\r\n$body";
    close $client;
}
