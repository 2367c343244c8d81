#!/usr/bin/perl
# A stand-in for Ollama, for machines where no real one can be had: it answers as the docs of Ollama say it does,
# from the store of models that its unit names, and computes nothing. Only perl-base; one request after another.
#
# STAND_IN, in its environment, makes it misbehave: slow=N answers nothing for N seconds after it listens; vram=N says
# that N percent of a model are on the GPU; context=N loads with N tokens; load=500 or load=503 fails to load;
# blind lists no model, as a version would that does not take what lies in its store.
# Its version is in the file `version` of its build.
use strict;
use warnings;
use IO::Socket::INET;

my ($build) = $0 =~ m{^(.*)/bin/[^/]+$};
my $version = slurp("$build/version");
if ($ARGV[0] eq '--version') {
    print "Warning: could not connect to a running Ollama instance\nWarning: client version is $version\n";
    exit;
}
my %odd = map { /(\w+)=?(.*)/ } split ' ', $ENV{STAND_IN} // '';
my $store = $ENV{OLLAMA_MODELS};
my %loaded;
mkdir $_ for $store, "$store/blobs", "$store/manifests";
my ($bind, $port) = $ENV{OLLAMA_HOST} =~ /^(.*):(\d+)$/;
my $listen = IO::Socket::INET->new(LocalAddr => $bind, LocalPort => $port, Listen => 64, ReuseAddr => 1) or die "Error: $!\n";
sleep($odd{slow} // 0);
$SIG{PIPE} = 'IGNORE';
while (my $client = $listen->accept) {
    my ($method, $path) = (<$client> // '') =~ m{^(\S+) (\S+)} or next;
    my $length = 0;
    while (defined(my $line = <$client>)) {
        $length = $1 if $line =~ /^content-length:\s*(\d+)/i;
        print $client "HTTP/1.1 100 Continue\r\n\r\n" if $line =~ /^expect:/i;
        last if $line eq "\r\n";
    }
    my $body = '';
    read $client, $body, $length if $length;
    my ($status, $answer) = route("$method $path", $body);
    $answer = '' if $method eq 'HEAD';
    print $client "HTTP/1.1 $status X\r\nContent-Type: application/json\r\nContent-Length: ", length $answer,
        "\r\nConnection: close\r\n\r\n$answer";
    close $client;
}

sub slurp { open my $file, '<', $_[0] or return ''; local $/; my $text = <$file> // ''; $text =~ s/\n\z//; $text }

sub manifest { my ($name) = @_; exists $odd{blind} && !-e "$store/created" ? '' : slurp("$store/manifests/registry.ollama.ai/library/$name/latest") }

sub digest { my ($text) = @_; open my $pipe, '-|', 'sha256sum', $text or die; (<$pipe> =~ /^(\w+)/)[0] }

sub models {
    my @names = map { m{([^/]+)/latest$} ? $1 : () } glob("$store/manifests/registry.ollama.ai/library/*/latest");
    grep { manifest($_) } @names;
}

sub layer { # MANIFEST KIND: the file of a layer
    my ($kind) = $_[0] =~ m{image\.$_[1]","digest":"sha256:(\w+)"} or return;
    "$store/blobs/sha256-$kind";
}

sub load { # NAME: as a runner does that opens the file and takes the parameters
    my ($name) = @_;
    my $manifest = manifest($name) or return (404, "model '$name' not found");
    return ($odd{load}, 'server busy, please try again. maximum pending requests exceeded') if ($odd{load} // 0) == 503;
    return ($odd{load}, 'model requires more system memory (5.6 GiB) than is available (1.2 GiB)') if $odd{load};
    my $file = layer($manifest, 'model') // '';
    open my $model, '<', $file or return (500, "open $file: $!");
    read $model, my $magic, 4;
    return (500, "$file is no GGUF") if $magic ne 'GGUF';
    my ($context) = slurp(layer($manifest, 'params') // '') =~ /"num_ctx":(\d+)/;
    $loaded{$name} = [-s $model, $odd{context} // $context // $ENV{OLLAMA_CONTEXT_LENGTH}];
    return (200, '');
}

sub route {
    my ($request, $body) = @_;
    my ($name) = $body =~ /"model": ?"([^":]+)/;
    return (200, qq({"version":"$version"})) if $request eq 'GET /api/version';
    if ($request eq 'GET /api/tags') {
        my @list = map { qq({"name":"$_:latest","model":"$_:latest","size":1,"digest":") . digest("$store/manifests/registry.ollama.ai/library/$_/latest") . qq("}) } models();
        return (200, '{"models":[' . join(',', @list) . ']}');
    }
    if ($request eq 'GET /api/ps') {
        my $percent = $odd{vram} // 0;
        my @list = map { my ($size, $context) = @{$loaded{$_}}; qq({"name":"$_:latest","model":"$_:latest","size":$size,"digest":"0","details":{"format":"gguf","families":["llama"]},"expires_at":"2318-03-01T12:00:00Z","size_vram":) . int($size * $percent / 100) . qq(,"context_length":$context}) } keys %loaded;
        return (200, '{"models":[' . join(',', @list) . ']}');
    }
    if ($request =~ m{^POST (/api/generate|/v1/completions)$}) {
        my ($status, $why) = load($name // '');
        return ($status, qq({"error":"$why"})) if $status != 200;
        return (200, qq({"model":"$name","response":"","done":true,"done_reason":"load"})) if $body !~ /"prompt"/;
        my $choice = qq({"choices":[{"text":" stand-in"}],"model":"$name"});
        return (200, $body =~ /"stream": ?true/ ? "data: $choice\n\ndata: $choice\n\ndata: [DONE]\n\n" : $choice) if $1 ne '/api/generate';
        return (200, qq({"model":"$name","response":" a","done":false}\n{"model":"$name","response":"","done":true,"done_reason":"length"}\n));
    }
    if ($request =~ m{^(HEAD|POST) /api/blobs/sha256:(\w+)$}) {
        my $file = "$store/blobs/sha256-$2";
        return (-e $file ? 200 : 404, '') if $1 eq 'HEAD';
        open my $out, '>', $file or return (500, '{"error":"read-only"}');
        print $out $body;
        close $out;
        return digest($file) eq $2 ? (201, '') : (400, '{"error":"digest mismatch"}');
    }
    if ($request eq 'POST /api/create') {
        my ($sum) = $body =~ /"sha256:(\w+)"/;
        my ($params) = $body =~ /"parameters":(\{[^}]*\})/;
        my $folder = "$store/manifests/registry.ollama.ai/library/$name";
        system 'mkdir', '-p', $folder;
        put("$store/created", '');
        put("$store/blobs/params", $params);
        my $of_params = digest("$store/blobs/params");
        rename "$store/blobs/params", "$store/blobs/sha256-$of_params";
        put("$folder/latest", qq({"layers":[{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:$sum"},{"mediaType":"application/vnd.ollama.image.params","digest":"sha256:$of_params"}]}));
        return (200, '{"status":"success"}');
    }
    return (404, '404 page not found');
}

sub put { my ($path, $text) = @_; open my $file, '>', $path or die "$path: $!"; print $file $text; close $file }
