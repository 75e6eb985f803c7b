{{/* The files that --config names: the chart's own decisions win over `settings`. */}}
{{- define "baton.routerConfig" -}}
{{- $config := deepCopy .Values.router.settings -}}
{{- $_ := set $config "http_host" "0.0.0.0" -}}
{{- $_ := set $config "grpc_host" "0.0.0.0" -}}
{{- $_ := set $config "http_port" 8000 -}}
{{- $_ := set $config "grpc_port" 50051 -}}
{{- $_ := set $config "served_model_name" .Values.model.name -}}
{{- $_ := set $config "drain_timeout_s" .Values.router.drainSeconds -}}
{{- $_ := set $config "registry" .Values.router.registry -}}
{{- if eq .Values.model.source "hub" -}}
{{- $_ := set $config "tokenizer" "/models/served" -}}
{{- else -}}
{{- $_ := set $config "tokenizer" (include "baton.modelPath" .) -}}
{{- end -}}
{{- if eq .Values.router.registry "kubernetes" -}}
{{- $selector := printf "app.kubernetes.io/part-of=baton,app.kubernetes.io/instance=%s,app.kubernetes.io/component!=router,baton.dev/revision=%s" .Release.Name (include "baton.revision" .) -}}
{{- $_ := set $config "kubernetes_namespace" .Release.Namespace -}}
{{- $_ := set $config "kubernetes_selector" $selector -}}
{{- end -}}
{{- if eq .Values.router.registry "redis" -}}
{{- $_ := set $config "redis_prefix" (printf "%s-%s" (include "baton.fullname" .) (include "baton.revision" .)) -}}
{{- if .Values.redis.externalUrl -}}
{{- $_ := set $config "redis_url" .Values.redis.externalUrl -}}
{{- else if .Values.redis.enabled -}}
{{- $_ := set $config "redis_url" (printf "redis://%s-redis:6379/0" (include "baton.fullname" .)) -}}
{{- end -}}
{{- end -}}
{{- if .Values.tls.enabled -}}
{{- $_ := set $config "tls_cert" "/etc/baton-tls/tls.crt" -}}
{{- $_ := set $config "tls_key" "/etc/baton-tls/tls.key" -}}
{{- if .Values.tls.clientCaSecretName -}}
{{- $_ := set $config "tls_client_ca" "/etc/baton-client-ca/ca.crt" -}}
{{- end -}}
{{- if .Values.tls.workers.enabled -}}
{{- $_ := set $config "tls_ca" "/etc/baton-tls/ca.crt" -}}
{{- $_ := set $config "tls_server_name" .Values.tls.workers.serverName -}}
{{- end -}}
{{- end -}}
{{- if .Values.apiKeys.secretName -}}
{{- $_ := set $config "api_keys_file" (printf "/etc/baton-keys/%s" .Values.apiKeys.secretKey) -}}
{{- end -}}
{{- if include "baton.workersApart" . -}}
{{- $_ := set $config "workers_host" "0.0.0.0" -}}
{{- $_ := set $config "workers_port" 50052 -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Where a worker serves its metrics: beside each other where two share a pod. Takes its gRPC port. */}}
{{- define "baton.metricsPort" -}}
{{- add 9464 (sub . 50061) -}}
{{- end -}}

{{/* Takes a list: root, the role's values, port. */}}
{{- define "baton.workerConfig" -}}
{{- $root := index . 0 -}}
{{- $worker := index . 1 -}}
{{- $config := deepCopy $worker.settings -}}
{{- $_ := set $config "model" (include "baton.modelPath" $root) -}}
{{- $_ := set $config "served_model_name" $root.Values.model.name -}}
{{- $_ := set $config "port" (index . 2) -}}
{{- $_ := set $config "metrics_port" (int (include "baton.metricsPort" (index . 2))) -}}
{{- $_ := set $config "router" (printf "%s-registry:%s" (include "baton.fullname" $root) (include "baton.registryPort" $root)) -}}
{{- $_ := set $config "device" (ternary "cuda" "cpu" (gt (int $worker.gpus) 0)) -}}
{{- if $root.Values.tls.workers.enabled -}}
{{- range $setting, $file := dict "tls_cert" "tls.crt" "tls_key" "tls.key" "tls_ca" "ca.crt" -}}
{{- $_ := set $config $setting (printf "/etc/baton-tls/%s" $file) -}}
{{- end -}}
{{- $_ := set $config "tls_server_name" $root.Values.tls.workers.serverName -}}
{{- end -}}
{{- if and (gt (int $worker.gpus) 1) (not (hasKey $config "tensor_parallel_size")) -}}
{{- $_ := set $config "tensor_parallel_size" (int $worker.gpus) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}
